"""What the devices and the laptop share. Runs on Python 3.8, and imports nothing else of the suite."""
