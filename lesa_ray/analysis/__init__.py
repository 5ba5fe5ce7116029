"""What a checkpoint's weights look like, without training: spectra, norms, likeness of neighbours, pictures of the
layers, held-out fit quality, and (with data) what each layer adds to the residual stream.

    headers ▸ for each weight type: its layers, one at a time ▸ forward pass over some tokens ▸ analysis.json

The figures are computed here in a plain process; `lesa_ray.distributed.analyze` runs them on a cluster.
"""
