//! Free space: slabs of 4 MiB, each cut into slots of one page size when it is first needed.
//!
//! Invariant: a slot is taken at most once; a slab without a taken slot belongs to no size. Nothing of this is on disk:
//! it follows from the page table. A freed slot must not come back here before its freeing is durable.

use crate::store::geometry::{SLAB_BYTES, UNIT_BYTES, UNITS_PER_SLAB, ZONE_SLABS};
use std::collections::BTreeSet;

/// Page size as the power of two above 64 KiB: 0 to 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SizeClass(u8);

impl SizeClass {
    /// For a power of two from 64 KiB to 4 MiB.
    pub(crate) fn of(page_bytes: u32) -> Self {
        assert!(page_bytes.is_power_of_two(), "page of {page_bytes} bytes");
        let class = u64::from(page_bytes) / UNIT_BYTES;
        assert!((1..=u64::from(UNITS_PER_SLAB)).contains(&class), "page of {page_bytes} bytes");
        Self(class.trailing_zeros() as u8)
    }

    pub(crate) fn units(self) -> u32 {
        1 << self.0
    }

    /// A bit per slot of a slab.
    fn all_slots(self) -> u64 {
        u64::MAX >> (64 - (UNITS_PER_SLAB >> self.0))
    }
}

const UNUSED: u8 = u8::MAX;

/// Slabs of one zone; made when the first of them is used, so that an empty device of any size costs little.
struct Zone {
    class: [u8; ZONE_SLABS as usize],
    /// Free slots of each used slab, one bit each.
    free: [u64; ZONE_SLABS as usize],
}

/// What is free on a device.
pub(crate) struct Space {
    slabs: u32,
    zones: Vec<Option<Box<Zone>>>,
    free_slabs: u32,
    /// No unused slab lies below.
    unused_from: u32,
    /// Slabs of each size with a free slot.
    partial: [BTreeSet<u32>; 7],
}

/// A slot that was just taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// In units of 64 KiB.
    pub(crate) slot: u32,
    /// Its slab was unused: the cells of the whole slab mean nothing yet.
    pub(crate) fresh_slab: bool,
}

impl Space {
    pub(crate) fn new(slabs: u32) -> Self {
        let mut space =
            Self { slabs: 0, zones: Vec::new(), free_slabs: 0, unused_from: 0, partial: Default::default() };
        space.grow(slabs);
        space
    }

    pub(crate) fn grow(&mut self, slabs: u32) {
        assert!(slabs >= self.slabs, "a device never shrinks while it is open");
        self.zones.resize_with(slabs.div_ceil(ZONE_SLABS) as usize, || None);
        self.free_slabs += slabs - self.slabs;
        self.slabs = slabs;
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        u64::from(self.free_slabs) * SLAB_BYTES
    }

    fn class_of(&self, slab: u32) -> u8 {
        let zone = &self.zones[(slab / ZONE_SLABS) as usize];
        zone.as_ref().map_or(UNUSED, |zone| zone.class[(slab % ZONE_SLABS) as usize])
    }

    fn slab(&mut self, slab: u32) -> (&mut u8, &mut u64) {
        let zone = self.zones[(slab / ZONE_SLABS) as usize].get_or_insert_with(|| {
            Box::new(Zone { class: [UNUSED; ZONE_SLABS as usize], free: [0; ZONE_SLABS as usize] })
        });
        let at = (slab % ZONE_SLABS) as usize;
        (&mut zone.class[at], &mut zone.free[at])
    }

    fn open_slab(&mut self, slab: u32, class: SizeClass) {
        let (kept, free) = self.slab(slab);
        (*kept, *free) = (class.0, class.all_slots());
        self.free_slabs -= 1;
        self.partial[class.0 as usize].insert(slab);
    }

    /// Takes a slot for a page of this size; `None` when there is none.
    pub(crate) fn take(&mut self, class: SizeClass) -> Option<Taken> {
        let (slab, fresh_slab) = match self.partial[class.0 as usize].first() {
            Some(slab) => (*slab, false),
            None => (self.unused_slab()?, true),
        };
        if fresh_slab {
            self.open_slab(slab, class);
        }
        let (_, free) = self.slab(slab);
        let index = free.trailing_zeros();
        *free &= *free - 1;
        if *free == 0 {
            self.partial[class.0 as usize].remove(&slab);
        }
        Some(Taken { slot: slab * UNITS_PER_SLAB + index * class.units(), fresh_slab })
    }

    fn unused_slab(&mut self) -> Option<u32> {
        while self.unused_from < self.slabs && self.class_of(self.unused_from) != UNUSED {
            self.unused_from += 1;
        }
        (self.unused_from < self.slabs).then_some(self.unused_from)
    }

    /// Takes this very slot, as the page table says at an opening. False if it is taken, of another size or nowhere.
    pub(crate) fn claim(&mut self, slot: u32, class: SizeClass) -> bool {
        let (slab, unit) = (slot / UNITS_PER_SLAB, slot % UNITS_PER_SLAB);
        if slab >= self.slabs || !unit.is_multiple_of(class.units()) {
            return false;
        }
        match self.class_of(slab) {
            UNUSED => self.open_slab(slab, class),
            kept if kept != class.0 => return false,
            _ => {}
        }
        let bit = 1u64 << (unit / class.units());
        let (_, free) = self.slab(slab);
        let was_free = *free & bit != 0;
        *free &= !bit;
        if *free == 0 {
            self.partial[class.0 as usize].remove(&slab);
        }
        was_free
    }

    /// Gives a slot back.
    pub(crate) fn release(&mut self, slot: u32, class: SizeClass) {
        let slab = slot / UNITS_PER_SLAB;
        let bit = 1u64 << (slot % UNITS_PER_SLAB / class.units());
        let (kept, free) = self.slab(slab);
        assert!(*kept == class.0 && *free & bit == 0, "slot {slot} is given back once");
        *free |= bit;
        if *free == class.all_slots() {
            *kept = UNUSED;
            self.partial[class.0 as usize].remove(&slab);
            self.free_slabs += 1;
            self.unused_from = self.unused_from.min(slab);
        } else {
            self.partial[class.0 as usize].insert(slab);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_slot_is_never_given_twice_and_all_come_back() {
        let mut space = Space::new(3);
        let (small, large) = (SizeClass::of(64 << 10), SizeClass::of(4 << 20));
        let mut taken = Vec::new();
        taken.push((space.take(large).unwrap().slot, large));
        while let Some(got) = space.take(small) {
            assert_eq!(got.fresh_slab, got.slot % UNITS_PER_SLAB == 0);
            taken.push((got.slot, small));
        }
        assert_eq!(taken.len(), 1 + 2 * 64);
        assert_eq!((space.free_bytes(), space.take(large)), (0, None));
        let mut unique: Vec<u32> = taken.iter().map(|(slot, _)| *slot).collect();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), taken.len());
        for (slot, class) in taken {
            space.release(slot, class);
        }
        assert_eq!(space.free_bytes(), 3 * SLAB_BYTES);
        assert_eq!(space.take(large).unwrap().slot, 0);
    }

    #[test]
    fn a_claimed_slot_is_refused_the_second_time() {
        let mut space = Space::new(2);
        let class = SizeClass::of(1 << 20);
        assert!(space.claim(16, class));
        assert!(!space.claim(16, class), "owned twice");
        assert!(!space.claim(32, SizeClass::of(64 << 10)), "a slab of another size");
        assert!(!space.claim(17, class), "between two slots");
        assert!(!space.claim(2 * UNITS_PER_SLAB, class), "beyond the device");
        assert_eq!(space.take(class).unwrap(), Taken { slot: 0, fresh_slab: false });
    }
}
