"""The two passes of the head over tiles of class centers.

``passes`` is the loop over tiles, ``parts`` what goes into it and between the passes, ``products``
its matrix products, ``positives`` what is left out of them. The other steps of a tile are in
``torch_steps`` for any device and in ``triton_steps`` for GPUs; ``dispatch`` has the one of a path.
``fused`` and ``fused_kernels`` are pass 1 once more, as one kernel.
"""
