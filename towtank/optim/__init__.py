"""Update rules, schedules and what surrounds them."""
