"""Other people's measurements as ours: public tables, profiler traces and benchmark output become rows."""
