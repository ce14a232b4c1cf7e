"""`mig demo`: a running guest moves live between two processes of this machine."""
