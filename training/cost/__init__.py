"""What a run costs: where its time goes, the hours of its devices, and the limit on them."""
