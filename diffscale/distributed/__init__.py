"""Ray: connecting, jobs, workers, process groups and messages, with every private part of Ray that is used."""
