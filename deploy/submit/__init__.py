"""`distill submit`: sends a run to a Ray cluster as a job."""
