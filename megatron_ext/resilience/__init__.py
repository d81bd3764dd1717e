"""Why runs stop, and what follows: stop requests, outcomes, failure classes, policy, watchers."""
