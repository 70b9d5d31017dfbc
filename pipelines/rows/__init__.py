"""What good rows are and what is made of them: the parts of prepare."""
