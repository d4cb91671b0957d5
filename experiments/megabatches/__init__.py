"""What `experiments.anytime` is made of: its flags, its learners, their walk."""
