"""A whole cluster in virtual time: the real engine, router and dispatch over simulated workers and network.

Start with `simulation.Simulation`. What a simulated second costs depends on events, never on time.
"""
