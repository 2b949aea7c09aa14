"""What runs at a site: unpack the message, call the cohort engine, pack the reply."""
