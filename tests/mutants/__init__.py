"""Wrong answers that learners give, exercise by exercise, each with a fragment of the message that must name the mistake."""
