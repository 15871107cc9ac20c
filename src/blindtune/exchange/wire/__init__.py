"""The wire of split tuning: messages, the transports that carry them, and what guards a server."""
