"""Several hosts: what a run will cost, whether they are ready, and starting and ending it on all of them."""
