"""What the papers ran, run again, with the published figures beside what comes out."""
