//! Work on a disk, on a thread of its own.

/// Does what syncs files aside. A disk may take hundreds of milliseconds for it, and a runtime's thread that
/// waits for that carries nothing meanwhile: a leader hears no follower, and leads no more; a worker's beats
/// fail to come. There is no deadline, so nothing that others wait for may wait for it.
///
/// What was begun is done to its end, also where whoever waits for it is gone.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime ends, and this with it.
            Err(_) => std::future::pending().await,
        },
    }
}
