"""Runtime: starting and ending ranks, the watchdog, and memory kept from one step to the next."""
