"""Networks, each in a file with its settings, and the interface that they implement."""
