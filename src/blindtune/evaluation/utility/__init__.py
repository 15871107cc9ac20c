"""What a model is worth: perplexity, multiple choice, the five rows of offsite-tuning."""
