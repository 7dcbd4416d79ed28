"""What a run is told, and what is wrong with it. No weights are read here, and no worker is started.

Torch is imported by `checks`, and by `acceleration` for what its arguments may be; by nothing else here.
"""
