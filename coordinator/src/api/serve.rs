//! ● Accepts connections, in the clear or with TLS, each with time-outs, and lets them finish when the coordinator drains.

use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::{ApiContext, routes};

type Service = TowerToHyperService<axum::Router>;

/// How long to wait after `accept` failed: mostly no file descriptor is free, and one may become so.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves until `context.draining` becomes true; then the task ends as soon as the connections have
/// finished what they do. Aborting it ends them at once.
pub fn serve(listener: TcpListener, context: ApiContext) -> JoinHandle<()> {
    tokio::spawn(accept(listener, Arc::new(context)))
}

async fn accept(listener: TcpListener, context: Arc<ApiContext>) {
    let address = match listener.local_addr() {
        Ok(address) => address,
        Err(error) => return tracing::error!(%error, "the API's socket does not work"),
    };
    let service = TowerToHyperService::new(routes(Arc::clone(&context), address));
    // HTTP/1.1 alone: telling the versions apart would wait for the first bytes without a bound.
    let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
    server.http1().timer(TokioTimer::new()).header_read_timeout(context.limits.header_timeout);
    let places = Arc::new(Semaphore::new(context.limits.connections_max));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    // It ends with the set.
    if let Some(tls) = &context.tls {
        let fresh = until_draining(context.draining.clone(), Arc::clone(tls).keep_fresh());
        connections.spawn(async move {
            let _ = fresh.await;
        });
    }
    while let Some(stream) = next(&listener, &places, &context.draining).await {
        let (stream, place) = match stream {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        // A stream of tokens is many small writes; each should leave at once.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot switch off Nagle's algorithm");
        }
        let served = Served {
            server: server.clone(),
            service: service.clone(),
            watcher: graceful.watcher(),
        };
        let (tls, draining) = (context.tls.clone(), context.draining.clone());
        connections.spawn(async move {
            let _place = place;
            match tls {
                None => served.converse(stream).await,
                // A handshake has nothing that could finish.
                Some(tls) => match until_draining(draining, tls.accept(stream)).await {
                    Some(Ok(stream)) => served.converse(stream).await,
                    Some(Err(error)) => tracing::debug!(%error, "no TLS with a client"),
                    None => {}
                },
            }
        });
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    graceful.shutdown().await;
    while connections.join_next().await.is_some() {}
}

/// What a connection is served with.
struct Served {
    server: auto::Builder<TokioExecutor>,
    service: Service,
    watcher: Watcher,
}

impl Served {
    async fn converse<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: S) {
        let connection = self.server.serve_connection(TokioIo::new(stream), self.service);
        if let Err(error) = self.watcher.watch(connection.into_owned()).await {
            // Hang-ups and slow headers are a client's everyday life.
            tracing::debug!(error, "a connection ended early");
        }
    }
}

/// What comes of it, or `None` where the coordinator drains before.
async fn until_draining<T>(
    mut draining: watch::Receiver<bool>,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::select! {
        done = work => Some(done),
        // A sender that is gone means that the coordinator is gone.
        _ = draining.wait_for(|draining| *draining) => None,
    }
}

type Accepted = std::io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)>;

/// The next connection, when there is a place for it; `None` once the coordinator drains.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    draining: &watch::Receiver<bool>,
) -> Option<Accepted> {
    let accepted = async {
        // The semaphore is never closed.
        let place = Arc::clone(places).acquire_owned().await.map_err(std::io::Error::other)?;
        let (stream, _) = listener.accept().await?;
        Ok((stream, place))
    };
    until_draining(draining.clone(), accepted).await
}
