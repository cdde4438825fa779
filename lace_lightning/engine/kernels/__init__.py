"""Triton kernels of one decoding step; imported only where there is a CUDA device.

Every kernel asks for what it can before its inputs are ready and then waits for the previous kernel (programmatic
dependent launch, ``PDL``): all of them must wait, so that the end of one implies the end of all before it.
"""
