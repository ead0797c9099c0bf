"""Training, evaluation and data for Uni-ViGU; depends on `univigu`, never the other way round."""
