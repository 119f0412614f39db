//! Messages on a beat connection: a length of four bytes, big endian, and protobuf.

use std::io;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const BYTES_MAX: usize = 64 << 10;

pub(super) async fn write(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &impl Message,
) -> io::Result<()> {
    let length = message.encoded_len();
    if BYTES_MAX < length {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a beat is too large"));
    }
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    message.encode(&mut bytes).map_err(io::Error::other)?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}

pub(super) async fn read<M: Message + Default>(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<M> {
    let length = stream.read_u32().await? as usize;
    if BYTES_MAX < length {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a beat is too large"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    M::decode(bytes.as_slice()).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use proto::link::{Beat, Held};

    use super::*;

    #[tokio::test]
    async fn a_beat_reads_back() {
        let held = vec![Held { shard: 1, epoch: 2, open: true }];
        let beat = Beat { number: 7, held, ..Beat::default() };
        let mut bytes = Vec::new();
        write(&mut bytes, &beat).await.unwrap();
        assert_eq!(read::<Beat>(&mut bytes.as_slice()).await.unwrap(), beat);
    }

    #[tokio::test]
    async fn a_beat_is_bounded_both_ways() {
        let large =
            Beat { held: vec![Held { shard: 1, epoch: 2, open: true }; 40_000], ..Beat::default() };
        assert!(write(&mut Vec::new(), &large).await.is_err());
        let length = 65_537_u32.to_be_bytes();
        let error = read::<Beat>(&mut length.as_slice()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
