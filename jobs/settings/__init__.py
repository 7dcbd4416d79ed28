"""What a run is told, and what is wrong with it. No weights are read here, and no worker is started."""
