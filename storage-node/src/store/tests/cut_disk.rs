//! A disk in memory that loses power: an image in blocks of 4 KiB, and what may have reached it at a cut.

use crate::store::aligned::AlignedBuf;
use crate::store::disk::Disk;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

/// Numbers that depend on the seed alone.
#[derive(Clone)]
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % below
    }
}

/// Content of a device; blocks never written are zeroes.
#[derive(Clone, Default)]
pub(super) struct Image(BTreeMap<u64, Rc<Vec<u8>>>);

impl Image {
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) {
        for (nth, part) in buf.chunks_mut(4096).enumerate() {
            match self.0.get(&(at / 4096 + nth as u64)) {
                Some(block) => part.copy_from_slice(block),
                None => part.fill(0),
            }
        }
    }

    pub(super) fn write(&mut self, at: u64, data: &[u8]) {
        for (nth, part) in data.chunks(4096).enumerate() {
            self.0.insert(at / 4096 + nth as u64, Rc::new(part.to_vec()));
        }
    }

    /// Only some pieces of `unit` bytes arrive, each by a roll of the dice.
    pub(super) fn write_torn(&mut self, at: u64, data: &[u8], unit: usize, dice: &mut Dice) {
        let mut mixed = vec![0; data.len()];
        self.read(at, &mut mixed);
        for (new, old) in data.chunks(unit).zip(mixed.chunks_mut(unit)) {
            if dice.roll(2) == 0 {
                old.copy_from_slice(new);
            }
        }
        self.write(at, &mixed);
    }
}

/// What happened to a disk, in order.
#[derive(Clone)]
pub(super) enum Step {
    Write(u64, Rc<Vec<u8>>),
    Sync,
}

/// A disk whose writes are recorded, each one whole before the next begins: for recovery.
pub(super) struct CutDisk {
    pub(super) image: RefCell<Image>,
    pub(super) steps: RefCell<Vec<Step>>,
    pub(super) bytes: u64,
}

impl CutDisk {
    pub(super) fn new(image: Image, bytes: u64) -> Self {
        Self { image: RefCell::new(image), steps: RefCell::default(), bytes }
    }
}

impl Disk for CutDisk {
    fn read(&self, at: u64, buf: &mut AlignedBuf) -> io::Result<()> {
        assert!(at + buf.len() as u64 <= self.bytes, "a read beyond the device");
        self.image.borrow().read(at, buf);
        Ok(())
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        assert!(at + data.len() as u64 <= self.bytes, "a write beyond the device");
        self.image.borrow_mut().write(at, data);
        self.steps.borrow_mut().push(Step::Write(at, Rc::new(data.to_vec())));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.steps.borrow_mut().push(Step::Sync);
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }
}

/// Which of the writes that no flush covered reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// All: the prefix of the trace.
    All,
    /// None: a cache that loses everything.
    None,
    /// A random subset.
    Some,
    /// A random subset, and the last of them torn.
    LastTorn,
    /// A random subset, each of them torn or not.
    ManyTorn,
}

pub(super) const FATES: [Fate; 5] = [Fate::All, Fate::None, Fate::Some, Fate::LastTorn, Fate::ManyTorn];

/// The image after a cut: `image` is durable, `open` may have arrived. `unit` = bytes that the device keeps whole.
pub(super) fn cut<'a>(
    image: &mut Image,
    open: impl Iterator<Item = (u64, &'a Rc<Vec<u8>>)>,
    fate: Fate,
    unit: usize,
    dice: &mut Dice,
) {
    let open: Vec<_> = open.collect();
    let last = open.len().wrapping_sub(1);
    for (nth, (at, data)) in open.into_iter().enumerate() {
        let torn = match fate {
            Fate::All => false,
            Fate::None => continue,
            Fate::LastTorn if nth == last => true,
            _ if dice.roll(2) == 0 => continue,
            Fate::ManyTorn => dice.roll(2) == 0,
            Fate::Some | Fate::LastTorn => false,
        };
        match torn {
            true => image.write_torn(at, data, unit, dice),
            false => image.write(at, data),
        }
    }
}
