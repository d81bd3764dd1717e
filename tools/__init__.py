"""One-shot programs: each makes one thing from another and exits."""
