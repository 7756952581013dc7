"""Tuning: what one measures before a long run.

sweep.sweep                   learning rates on a small model, and on larger ones beside it
transfer.transfer             whether the best rate of the small one serves the larger
coordinates.coordinate_check  whether activations and their changes keep their size
"""
