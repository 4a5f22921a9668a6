"""How each device computes the operators of ops.py: one module a device, registered by the operator's name."""
