"""What several routers share: engines, bookings, tenants' counters and claims on keyed requests."""
