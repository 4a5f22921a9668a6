"""How each device computes the operators of autograd.py: one module a device, which gives operators.py its sums."""
