"""When requests came and how long they are; what ran when; and the metrics over both."""
