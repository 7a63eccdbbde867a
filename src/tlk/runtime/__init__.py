"""Token ids in, token ids out: requests, pages, scheduler, runner and the engine that drives them."""
