"""What a user sees: console, run report, parameter and memory tables, model cards. Plain data in, text out."""
