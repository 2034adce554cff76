//! The cuts themselves: what a recovery must find at one point of a trace.

use super::*;

pub(super) fn read_version(core: &mut Core, disk: &mut Image, page: PageKey, block: u32, what: &str) -> u64 {
    let answer = ask(core, disk, MediumOp::Read { page, blocks: block..block + 1 });
    let MediumAnswer::Data { data, bad } = answer else { panic!("{what}: {answer:?}") };
    assert!(bad.is_empty(), "{what}: {page:?} block {block} is bad");
    let version = u64::from_le_bytes(data[..8].try_into().unwrap());
    assert!(data == content(version), "{what}: {page:?} block {block} is torn");
    version
}

/// No slot has two owners, and what is not owned is free.
pub(super) fn check_space(core: &Core, opened: &Opened) {
    let slots = core.owned_slots();
    let unique: BTreeSet<u32> = slots.iter().map(|(slot, _)| *slot).collect();
    assert_eq!(unique.len(), slots.len());
    let used: BTreeSet<u32> = slots.iter().map(|(slot, _)| slot / UNITS_PER_SLAB).collect();
    assert_eq!(opened.free_bytes, opened.capacity_bytes - used.len() as u64 * SLAB_BYTES);
}

/// Cuts the power at this moment in every way, recovers, checks; cuts again during the recovery, recovers, checks.
pub(super) fn cut_here(trace: &Trace, moment: &Moment, at: usize, in_place: bool) {
    let unit = if in_place { 4096 } else { 512 };
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ at as u64);
    for fate in FATES {
        let image = moment.image(trace, fate, unit, &mut dice);
        let (disk, mut core, opened) = recovered(image.clone(), 2, in_place);
        moment.check(&mut core, &opened, &mut disk.image.borrow_mut(), &format!("event {at}, {fate:?}"));
        let again = cut_recovery(image, &disk.steps.borrow(), unit, &mut dice);
        let (disk, mut core, opened) = recovered(again, 3, in_place);
        moment.check(&mut core, &opened, &mut disk.image.borrow_mut(), &format!("event {at}, {fate:?}, twice"));
    }
}

/// The process is killed, so all that it wrote is to be seen; the power goes while the next one recovers, and what no
/// sync had covered is lost after all.
pub(super) fn kill_here(trace: &Trace, moment: &Moment, at: usize, in_place: bool) {
    let unit = if in_place { 4096 } else { 512 };
    let mut dice = Dice(0x2545_f491 ^ at as u64);
    let image = moment.image(trace, Fate::All, unit, &mut dice);
    let (disk, mut core, opened) = recovered(image, 2, in_place);
    moment.check(&mut core, &opened, &mut disk.image.borrow_mut(), &format!("event {at}, killed"));
    let open = moment.open.keys().map(|nth| Step::Write(trace.writes[*nth].0, trace.writes[*nth].1.clone()));
    let steps: Vec<Step> = open.chain(disk.steps.borrow().iter().cloned()).collect();
    for _ in 0..3 {
        let again = cut_recovery(moment.durable.clone(), &steps, unit, &mut dice);
        let (disk, mut core, opened) = recovered(again, 3, in_place);
        moment.check(&mut core, &opened, &mut disk.image.borrow_mut(), &format!("event {at}, killed and cut"));
    }
}

/// A cut somewhere in the recovery: what its last sync did not cover may be lost or torn.
pub(super) fn cut_recovery(mut image: Image, steps: &[Step], unit: usize, dice: &mut Dice) -> Image {
    let end = dice.roll(steps.len() as u64 + 1) as usize;
    let mut open: Vec<(u64, &Rc<Vec<u8>>)> = Vec::new();
    for step in &steps[..end] {
        match step {
            Step::Write(at, data) => open.push((*at, data)),
            Step::Sync => open.drain(..).for_each(|(at, data)| image.write(at, data)),
        }
    }
    let fate = FATES[dice.roll(FATES.len() as u64) as usize];
    cut(&mut image, open.into_iter(), fate, unit, dice);
    image
}

/// Every block of a page is what it may be.
pub(super) fn check_blocks(
    core: &mut Core,
    disk: &mut Image,
    (key, blocks): (PageKey, u32),
    page: &PageOracle,
    record: Option<&PageRecord>,
    what: &str,
) {
    for block in 0..blocks {
        let allowed = &page.blocks[block as usize];
        let value = match record.map_or(BlockState::Absent, |r| r.blocks.of(block)) {
            BlockState::Absent => Value::Absent,
            BlockState::Hole => Value::Hole,
            BlockState::Stale => Value::Stale(Kept::Nothing),
            BlockState::Present => Value::Data(read_version(core, disk, key, block, what)),
        };
        assert!(allowed.shows(value), "{what}: {key:?} block {block} is {value:?}, allowed {allowed:?}");
    }
}

/// I8: what a force makes of the recovered layer is what each block was when it became stale, never another page's.
pub(super) fn check_forced(core: &mut Core, disk: &mut Image, oracle: &[PageOracle], what: &str) {
    let what = format!("{what}, forced");
    assert_eq!(ask(core, disk, MediumOp::Commit(vec![trust()])), MediumAnswer::Done, "{what}");
    for ((key, blocks), page) in pages().into_iter().zip(oracle).filter(|((key, _), _)| key.layer == MARKED) {
        let mut page = page.clone();
        page.blocks.iter_mut().for_each(|block| block.only_trusted());
        let MediumAnswer::Page(record) = ask(core, disk, MediumOp::Load(key)) else { panic!("{what}") };
        check_blocks(core, disk, (key, blocks), &page, record.as_ref(), &what);
    }
}
