"""Who gives back the room of a gang."""

from pdserve.cluster.ray_actor import Room


def test_only_the_last_to_leave_gives_the_room_back_and_only_once() -> None:
    leader, follower = Room("group", ["host", "host"]).places
    assert not leader.room.left_by(leader)
    assert not leader.room.left_by(leader)
    assert follower.room.left_by(follower)
    assert not follower.room.left_by(follower)
    assert not leader.room.left_by(leader)
