"""How many engines there should be, and of which role: pure decisions over what was measured, and the loop around them.

Start with `controller.decide`. The same code decides for a running cluster and for a simulated one.
"""
