"""A site whose rows come in time: an alarm for drift, and replays that adapt before each block."""
