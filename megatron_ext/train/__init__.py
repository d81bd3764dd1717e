"""The loop, the step, the phases that drive it, and the callbacks around it."""
