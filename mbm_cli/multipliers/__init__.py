"""What a multiplier is: its name, its content, and the bit-level model of its product."""
