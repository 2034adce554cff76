//! The front: greets an NBD client itself, then copies bytes both ways between it and the disk process.

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Fixed newstyle, no zeroes after an export's name.
const SERVER_FLAGS: u16 = 3;
/// Has flags, flush, forced writes of the client's own accord.
const EXPORT_FLAGS: u16 = 1 | 1 << 2;
const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 1 << 31 | 1;
/// Nobody sends longer options here.
const MAX_OPTION: usize = 4096;

/// Serves clients, one after the other.
///
/// # Errors
/// The socket cannot be made. What goes wrong with a client ends that client alone.
pub fn serve(socket: &Path, disk: &str, bytes: u64) -> Result<()> {
    let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
    let mut buffer = vec![0; 1 << 20];
    for client in listener.incoming() {
        // One that only looked whether somebody is there, or went away.
        let _ = serve_one(client?, disk, bytes, &mut buffer);
    }
    Ok(())
}

fn serve_one(mut client: UnixStream, disk: &str, bytes: u64, buffer: &mut [u8]) -> Result<()> {
    greet(&mut client, bytes)?;
    let mut disk = TcpStream::connect(disk)?;
    disk.set_nodelay(true)?;
    loop {
        let (from_client, from_disk) = {
            let mut both = [PollFd::new(&client, PollFlags::IN), PollFd::new(&disk, PollFlags::IN)];
            poll(&mut both, None)?;
            (!both[0].revents().is_empty(), !both[1].revents().is_empty())
        };
        if from_disk && !copy(&mut disk, &mut client, buffer)? || from_client && !copy(&mut client, &mut disk, buffer)?
        {
            return Ok(());
        }
    }
}

/// Copies what is there; false at the end.
fn copy(from: &mut impl Read, to: &mut impl Write, buffer: &mut [u8]) -> Result<bool> {
    let count = from.read(buffer)?;
    to.write_all(&buffer[..count])?;
    Ok(count > 0)
}

fn number<const N: usize>(client: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    client.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The handshake, to the point where requests begin.
fn greet(client: &mut UnixStream, bytes: u64) -> Result<()> {
    client.write_all(&[&b"NBDMAGIC"[..], OPTION_MAGIC, &SERVER_FLAGS.to_be_bytes()].concat())?;
    number::<4>(client)?;
    loop {
        ensure!(number::<8>(client)? == *OPTION_MAGIC, "not an option");
        let option = u32::from_be_bytes(number(client)?);
        let length = u32::from_be_bytes(number(client)?) as usize;
        ensure!(length <= MAX_OPTION, "a long option");
        client.read_exact(&mut vec![0; length])?;
        match option {
            OPT_GO | OPT_INFO => {
                let export = [&[0, 0], &bytes.to_be_bytes()[..], &EXPORT_FLAGS.to_be_bytes()].concat();
                reply(client, option, REP_INFO, &export)?;
                reply(client, option, REP_ACK, &[])?;
            }
            OPT_ABORT => bail!("the client changed its mind"),
            _ => reply(client, option, REP_UNSUPPORTED, &[])?,
        }
        if option == OPT_GO {
            return Ok(());
        }
    }
}

fn reply(client: &mut UnixStream, option: u32, kind: u32, data: &[u8]) -> Result<()> {
    let head = [&REPLY_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()];
    let length = (data.len() as u32).to_be_bytes();
    Ok(client.write_all(&[&head.concat(), &length[..], data].concat())?)
}
