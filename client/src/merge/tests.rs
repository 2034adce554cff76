//! The guarantees of [`Aligned`], against a target that answers whenever the test wants.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::block::Completions;
use crate::ram::RamVolume;
use proptest::prelude::*;
use std::sync::Mutex;

const SIZE: u64 = 8 * BLOCK_BYTES;

/// Takes effect at once and in order, as a target must, but answers only when told, in any order.
struct Slow {
    ram: RamVolume,
    held: Mutex<Vec<(BlockRequest, BlockResult)>>,
}

#[derive(Default)]
struct Collected(Mutex<Vec<(u64, BlockResult)>>);

impl Completions for Collected {
    fn complete(&self, tag: u64, result: BlockResult) {
        self.0.lock().unwrap().push((tag, result));
    }
}

impl Collected {
    fn take(&self) -> Vec<(u64, BlockResult)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl BlockTarget for Slow {
    fn size(&self) -> u64 {
        self.ram.size()
    }

    fn read_only(&self) -> bool {
        self.ram.read_only()
    }

    fn submit(&self, request: BlockRequest) {
        let sink = Arc::new(Collected::default());
        self.ram.submit(BlockRequest { op: request.op.clone(), tag: 0, completions: sink.clone() });
        let result = sink.take().remove(0).1;
        self.held.lock().unwrap().push((request, result));
    }
}

impl Slow {
    fn new() -> Arc<Self> {
        Arc::new(Self { ram: RamVolume::new(SIZE), held: Mutex::default() })
    }

    /// Answer the request that `pick` chooses; whether there was one.
    fn answer(&self, pick: usize) -> bool {
        let mut held = self.held.lock().unwrap();
        if held.is_empty() {
            return false;
        }
        let at = pick % held.len();
        let (request, result) = held.remove(at);
        drop(held);
        request.completions.complete(request.tag, result);
        true
    }
}

fn write(address: u64, byte: u8, length: usize) -> BlockOp {
    BlockOp::Write { address, payload: vec![byte; length].into(), fua: false }
}

fn ask<T: BlockTarget + 'static>(aligned: &Aligned<T>, sink: &Arc<Collected>, tag: u64, op: BlockOp) {
    aligned.submit(BlockRequest { op, tag, completions: sink.clone() });
}

/// Ask a volume that answers at once.
fn now(ram: &Arc<RamVolume>, op: BlockOp) -> BlockResult {
    let sink = Arc::new(Collected::default());
    ask(&Aligned::new(ram.clone()), &sink, 0, op);
    let mut answers = sink.take();
    assert_eq!(answers.len(), 1, "each request is answered once");
    answers.remove(0).1
}

#[test]
fn an_unaligned_write_changes_its_bytes_and_no_others() {
    let ram = Arc::new(RamVolume::new(SIZE));
    now(&ram, write(0, 1, SIZE as usize)).unwrap();
    for (first, length) in [(1, 1), (4095, 2), (100, 3996), (0, 5), (4096, 4097), (5000, 12000), (4000, 8288)] {
        let before = ram.bytes_at(0, SIZE as usize);
        now(&ram, write(first as u64, 7, length)).unwrap();
        let mut expected = before;
        expected[first..first + length].fill(7);
        assert_eq!(ram.bytes_at(0, SIZE as usize), expected, "{length} bytes at {first}");
    }
}

#[test]
fn an_unaligned_read_gives_exactly_the_bytes_asked_for() {
    let ram = Arc::new(RamVolume::new(SIZE));
    for block in 0..8 {
        now(&ram, write(block * BLOCK_BYTES + 3, block as u8 + 1, 4000)).unwrap();
    }
    for (first, length) in [(1usize, 1usize), (4095, 2), (100, 9000), (4096, 100)] {
        let got = now(&ram, BlockOp::Read { address: first as u64, length: length as u32 }).unwrap();
        assert_eq!(got, ram.bytes_at(first, length));
    }
}

#[test]
fn the_longest_unaligned_read_and_write_work() {
    let longest = MAX_REQUEST_BYTES as usize;
    let ram = Arc::new(RamVolume::new(longest as u64 + BLOCK_BYTES));
    now(&ram, write(1, 9, longest)).unwrap();
    let got = now(&ram, BlockOp::Read { address: 1, length: MAX_REQUEST_BYTES }).unwrap();
    assert!(got.len() == longest && got.iter().all(|byte| *byte == 9));
    assert_eq!(ram.bytes_at(0, 1), [0]);
}

#[test]
fn a_discard_rounds_inwards_and_write_zeroes_is_exact() {
    let ram = Arc::new(RamVolume::new(SIZE));
    now(&ram, write(0, 5, SIZE as usize)).unwrap();
    now(&ram, BlockOp::Discard { address: 1, length: 4096 + 4095 }).unwrap();
    assert_eq!(ram.bytes_at(0, 4096), [5; 4096]);
    assert_eq!(ram.bytes_at(4096, 4096), [0; 4096]);
    now(&ram, BlockOp::Discard { address: 8193, length: 4000 }).unwrap();
    now(&ram, BlockOp::WriteZeroes { address: 12289, length: 4096, fua: false }).unwrap();
    assert_eq!(ram.bytes_at(8192, 4097), [5; 4097]);
    assert_eq!(ram.bytes_at(12289, 4096), [0; 4096]);
    assert_eq!(ram.bytes_at(12289 + 4096, 1), [5]);
}

#[test]
fn requests_outside_the_volume_or_too_long_are_refused_whole() {
    let ram = Arc::new(RamVolume::new(SIZE));
    let refused = [
        write(SIZE - 1, 1, 2),
        write(u64::MAX, 1, 1),
        BlockOp::Read { address: SIZE, length: 1 },
        BlockOp::Read { address: 0, length: MAX_REQUEST_BYTES + 1 },
        BlockOp::WriteZeroes { address: 1, length: SIZE, fua: false },
        BlockOp::Discard { address: 1, length: u64::MAX },
    ];
    for op in refused {
        assert_eq!(now(&ram, op.clone()), Err(BlockError::Invalid), "{op:?}");
    }
    assert_eq!(ram.bytes_at(0, SIZE as usize), vec![0; SIZE as usize]);
    let read_only = Arc::new(RamVolume::new(SIZE).into_read_only());
    assert_eq!(now(&read_only, write(1, 1, 1)), Err(BlockError::ReadOnly));
}

#[test]
fn a_shared_volume_takes_whole_blocks_and_any_read_but_merges_nothing() {
    let ram = Arc::new(RamVolume::new(SIZE));
    let shared = Aligned::shared(ram.clone());
    let sink = Arc::new(Collected::default());
    let zeroes = BlockOp::WriteZeroes { address: 4096, length: 5, fua: false };
    for (tag, op) in
        [write(0, 1, 4096), write(1, 2, 1), zeroes, BlockOp::Read { address: 1, length: 1 }].into_iter().enumerate()
    {
        ask(&shared, &sink, tag as u64, op);
    }
    let invalid = Err(BlockError::Invalid);
    assert_eq!(sink.take(), [(0, Ok(Bytes::new())), (1, invalid.clone()), (2, invalid), (3, Ok(vec![1].into()))]);
}

#[test]
fn a_change_of_the_same_block_waits_for_a_merge_and_others_do_not() {
    let slow = Slow::new();
    let aligned = Aligned::new(slow.clone());
    let sink = Arc::new(Collected::default());
    ask(&aligned, &sink, 1, write(10, 1, 10));
    ask(&aligned, &sink, 2, write(0, 2, 4096));
    ask(&aligned, &sink, 3, write(8192, 3, 4096));
    assert_eq!(slow.held.lock().unwrap().len(), 2, "the read of the merge, and the write elsewhere");
    while slow.answer(0) {}
    let order: Vec<u64> = sink.take().into_iter().map(|(tag, _)| tag).collect();
    assert_eq!(order, [3, 1, 2]);
    assert_eq!(slow.ram.bytes_at(0, 4096), [2; 4096]);
}

#[test]
fn an_error_of_any_part_is_the_answer_and_what_waited_goes_on() {
    for (error, expected) in [(BlockError::Io, BlockError::Io), (BlockError::Superseded, BlockError::Superseded)] {
        let slow = Slow::new();
        let aligned = Aligned::new(slow.clone());
        let sink = Arc::new(Collected::default());
        slow.ram.fail_with(Some(error));
        ask(&aligned, &sink, 1, write(10, 1, 5000));
        ask(&aligned, &sink, 2, write(4096, 2, 4096));
        slow.ram.fail_with(None);
        while slow.answer(0) {}
        assert_eq!(sink.take(), [(1, Err(expected)), (2, Ok(Bytes::new()))]);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Ask(u8, u64, u64),
    Answer(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ask = (0..4u8, 0..SIZE, prop_oneof![1..200u64, 1..3 * BLOCK_BYTES]);
    let ask = ask.prop_map(|(kind, address, length)| Step::Ask(kind, address, length.min(SIZE - address)));
    prop::collection::vec(prop_oneof![ask, any::<usize>().prop_map(Step::Answer)], 1..60)
}

/// What the bytes must be when every change so far has taken effect in the order asked.
fn model(bytes: &mut [u8], kind: u8, address: u64, length: u64, value: u8) -> BlockOp {
    let range = address as usize..(address + length) as usize;
    match kind {
        0 => {
            bytes[range].fill(0);
            BlockOp::WriteZeroes { address, length, fua: false }
        }
        1 => {
            let block = BLOCK_BYTES as usize;
            let (first, end) = (range.start.next_multiple_of(block), range.end - range.end % block);
            if first < end {
                bytes[first..end].fill(0);
            }
            BlockOp::Discard { address, length }
        }
        _ => {
            bytes[range].fill(value);
            write(address, value, length as usize)
        }
    }
}

proptest! {
    #[test]
    fn overlapping_changes_take_effect_in_the_order_asked_and_all_are_answered(steps in steps()) {
        let slow = Slow::new();
        let aligned = Aligned::new(slow.clone());
        let sink = Arc::new(Collected::default());
        let mut bytes = vec![0; SIZE as usize];
        let mut asked = 0;
        for step in steps {
            match step {
                Step::Ask(kind, address, length) => {
                    asked += 1;
                    let op = model(&mut bytes, kind, address, length, asked as u8);
                    ask(&aligned, &sink, asked, op);
                }
                Step::Answer(pick) => {
                    slow.answer(pick);
                }
            }
        }
        while slow.answer(7) {}
        let mut answered: Vec<u64> = sink.take().into_iter().map(|(tag, result)| { result.unwrap(); tag }).collect();
        answered.sort_unstable();
        prop_assert_eq!(answered, (1..=asked).collect::<Vec<_>>());
        prop_assert_eq!(slow.ram.bytes_at(0, SIZE as usize), bytes);
    }
}

#[test]
fn concurrent_unaligned_writers_of_one_block_lose_nothing() {
    let ram = Arc::new(RamVolume::new(SIZE));
    let aligned = Arc::new(Aligned::new(ram.clone()));
    std::thread::scope(|scope| {
        for lane in 0..4u64 {
            let aligned = aligned.clone();
            scope.spawn(move || {
                let sink = Arc::new(Collected::default());
                for round in 0..2000u64 {
                    ask(&aligned, &sink, round, write(lane * 1024, round as u8, 1024));
                }
            });
        }
    });
    assert_eq!(ram.bytes_at(0, 4096), [(1999 % 256) as u8; 4096]);
}

/// Holds up the first request on its way in until told to let it go on.
struct Doorway {
    ram: RamVolume,
    came: std::sync::mpsc::SyncSender<()>,
    go_on: Mutex<Option<std::sync::mpsc::Receiver<()>>>,
}

impl BlockTarget for Doorway {
    fn size(&self) -> u64 {
        self.ram.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn submit(&self, request: BlockRequest) {
        self.came.send(()).unwrap();
        let go_on = self.go_on.lock().unwrap().take();
        if let Some(go_on) = go_on {
            go_on.recv().unwrap();
        }
        self.ram.submit(request);
    }
}

#[test]
fn a_merge_does_not_overtake_a_whole_write_that_is_just_being_handed_in() {
    let (came, arrivals) = std::sync::mpsc::sync_channel(8);
    let (go, go_on) = std::sync::mpsc::channel();
    let doorway = Arc::new(Doorway { ram: RamVolume::new(SIZE), came, go_on: Mutex::new(Some(go_on)) });
    let aligned = Arc::new(Aligned::new(doorway.clone()));
    let sink = Arc::new(Collected::default());
    let whole = std::thread::spawn({
        let (aligned, sink) = (aligned.clone(), sink.clone());
        move || ask(&aligned, &sink, 1, write(0, 2, 4096))
    });
    arrivals.recv().unwrap();
    ask(&aligned, &sink, 2, write(10, 1, 10));
    assert!(arrivals.try_recv().is_err(), "the merge must not read before the whole write has arrived");
    go.send(()).unwrap();
    whole.join().unwrap();
    assert_eq!(sink.take().len(), 2);
    assert_eq!(doorway.ram.bytes_at(9, 12), [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]);
}
