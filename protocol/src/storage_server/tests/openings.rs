//! What comes while something else becomes durable: a second device, a second `Open`.

use super::*;

fn second_device(net: &Net) -> Opened {
    let first = net.servers[0].medium.opened(10, BootId(2000));
    let copies = first.copies.iter().map(|c| CopyRecord { copy: CopyId(101), ..c.clone() }).collect();
    Opened { device: DeviceId(77), copies, ..first }
}

#[test]
fn a_device_that_opens_while_a_fence_is_under_way_is_fenced_too() {
    let mut net = Net::started(1);
    net.servers[0].medium.hold = true;
    let unsync = vec![CopyId(101)];
    let fence = Fence { volume: VOLUME, generation: Generation(2), flush: false, unsync };
    let call = net.control_later(0, ControlRequest::Fence(fence));
    net.run();
    let opened = second_device(&net);
    net.servers[0].other.copies = opened.copies.iter().map(|c| (c.copy, c.clone())).collect();
    net.input(0, Input::DeviceOpened(opened));
    net.servers[0].other_boot = Some(BootId(2000));
    net.servers[0].medium.hold = false;
    net.run();
    let ControlReply::Promised(promised) = &net.answers[&call] else { panic!("{:?}", net.answers[&call]) };
    let report = promised.copies.iter().find(|report| report.copy == CopyId(101)).unwrap();
    assert!(report.unsynced > 0, "H7: it was to be marked before the fence is answered");
    let blob = read_blob(&net.servers[0].other.volumes[&VOLUME]).unwrap();
    assert_eq!(blob.promised, Generation(2), "I2: what is answered is durable on every device that is spoken of");
}

#[test]
fn an_open_waits_for_its_own_incarnation_to_be_durable() {
    let mut net = Net::started(1);
    net.open(0, 1, 1);
    net.servers[0].medium.hold = true;
    net.send_open(0, 1, Incarnation(2), OpenNumber(1));
    net.send_open(0, 1, Incarnation(3), OpenNumber(2));
    net.run();
    net.servers[0].medium.release_one = true;
    net.run();
    let opened = net.replies.iter().any(|r| matches!(r.body, ReplyBody::Opened { .. }));
    assert!(!opened, "H20: only the commit of the lower one is durable");
    net.servers[0].medium.hold = false;
    net.run();
    assert!(net.replies.iter().any(|r| matches!(r.body, ReplyBody::Opened { incarnation: Incarnation(3), .. })));
}

#[test]
fn what_one_device_still_answers_for_a_flush_that_another_ones_failure_ended_goes_unheeded() {
    let mut net = Net::started(1);
    let mut opened = second_device(&net);
    opened.copies[0].group = 1;
    net.servers[0].other.copies = opened.copies.iter().map(|c| (c.copy, c.clone())).collect();
    net.input(0, Input::DeviceOpened(opened));
    net.servers[0].other_boot = Some(BootId(2000));
    net.serve(net.map_with_boots(2, |map| {
        let mut second = map.placements[0].groups[0].clone();
        (second.members[0].copy, second.members[0].boot) = (CopyId(101), BootId(2000));
        map.placements[0].groups.push(second);
    }));
    let handle = net.open(0, 2, 1);
    net.servers[0].medium.hold = true;
    net.send(0, handle, 2, RequestBody::Flush, Bytes::new());
    net.fail_device(0);
    net.servers[0].medium.hold = false;
    net.run();
    assert_eq!(net.replies.pop().unwrap().body, ReplyBody::NotServing, "R3");
}

/// R14: what waits behind other work when the device fails was not done, however often it was ordered.
#[test]
fn a_deletion_that_waits_when_its_device_fails_is_not_confirmed() {
    let mut net = Net::started(1);
    net.servers[0].medium.hold = true;
    let flush = ControlRequest::PrepareFlush { volume: VOLUME, generation: Generation(2) };
    let delete = ControlRequest::DeleteCopy { volume: VOLUME, copy: CopyId(100), generation: Generation(2) };
    net.control_later(0, flush);
    let waiting = [net.control_later(0, delete.clone()), net.control_later(0, delete.clone())];
    net.run();
    net.fail_device(0);
    net.run();
    for call in waiting {
        assert_eq!(net.answers[&call], ControlReply::DeviceClosed);
    }
    assert_eq!(net.control(0, delete), ControlReply::DeviceClosed, "the copy is still known to be there");
}

/// Found by the simulator: the order to make it came a second time, over a connection that its leader had given up.
#[test]
fn r14_a_copy_whose_deletion_was_ordered_is_not_made_by_a_late_order() {
    let mut net = Net::started(1);
    for (copy, was_there) in [(CopyId(500), true), (CopyId(501), false)] {
        let put = ControlRequest::PutCopy {
            volume: VOLUME,
            generation: Generation(9),
            copy,
            device: DeviceId::NONE,
            placement: 0,
            group: 0,
            layers: vec![(LAYER, 64 << 10)],
            unsynced: true,
        };
        if was_there {
            assert_eq!(net.control(0, put.clone()), ControlReply::Done);
        }
        let delete = ControlRequest::DeleteCopy { volume: VOLUME, copy, generation: Generation(2) };
        let deleted = if was_there { ControlReply::Done } else { ControlReply::NoCopy { copy } };
        assert_eq!(net.control(0, delete), deleted);
        assert!(matches!(net.control(0, put), ControlReply::Refused { .. }));
    }
}

#[test]
fn a_second_order_to_delete_does_not_confirm_a_deletion_that_the_device_lost() {
    let mut net = Net::started(1);
    net.servers[0].medium.hold = true;
    let delete = ControlRequest::DeleteCopy { volume: VOLUME, copy: CopyId(100), generation: Generation(2) };
    let calls = [net.control_later(0, delete.clone()), net.control_later(0, delete)];
    net.servers[0].medium.release_one = true;
    net.run();
    net.fail_device(0);
    net.run();
    for call in calls {
        assert_eq!(net.answers[&call], ControlReply::DeviceClosed);
    }
}
