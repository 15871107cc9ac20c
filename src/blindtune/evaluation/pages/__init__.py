"""What people read: reports as one HTML page, plots, figures, and tables for the terminal."""
