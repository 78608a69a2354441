"""What keeps a client running on its device. Runs on Python 3.8; imports common."""
