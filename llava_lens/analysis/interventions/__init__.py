"""What happens to the answer if something in the run is changed."""
