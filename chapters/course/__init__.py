"""The final project of the course: not a technique, but what a student makes of all of them."""
