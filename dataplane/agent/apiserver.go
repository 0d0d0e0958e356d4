// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/component-base/metrics"
	"k8s.io/klog/v2"
)

// How long an answer is waited for. An API server ends a list after a minute (--request-timeout), and sends a watch that asks for them a
// bookmark about every minute: what is silent for longer is none, but a proxy before it that has lost it, say. client-go waits for ever.
const (
	listLimit    = 2 * time.Minute
	silenceLimit = 3 * time.Minute
)

// shortWatch is how long a watch stands at least that is not a failure though nothing came by it. client-go's reflector has the same.
const shortWatch = time.Second

// awayLogPeriod is the least time between two lines in the log that say that the API server is away.
const awayLogPeriod = time.Minute

// What the API server may answer that is no error to client-go.
var (
	errNoList = errors.New("the answer is no list of an API server's: it has no resourceVersion")
	errEnded  = errors.New("the watch ended before anything came")
	errSilent = fmt.Errorf("nothing came for %v, not even a bookmark", silenceLimit)
)

// An apiServer is what the agent's informers hear of the API server: whether it answers and, if not, since when and why.
//
// Health does not ask it, as kube-proxy's does not. A node that has lost the API server carries all Services that it knew as well as before;
// and mostly it is the API server that is away, for all nodes at once, so that load balancers would have no node left.
//
// Note: informers have an error handler, which is not told of a watch that is refused, nor of one that ends: client-go begins those anew
// in silence, and that is how most API servers go away. So lists and watches are looked at themselves.
type apiServer struct {
	errors  *metrics.CounterVec
	running sync.WaitGroup // watches, which end when their informers do

	mu        sync.Mutex // guards what follows
	resources map[string]*heard
	since     time.Time // when the first resource of those that are away now went; zero: it answers
	said      time.Time // when the log said last that it is away
	told      bool      // whether it said so since it answered last
}

// heard is what was heard of a resource.
type heard struct {
	last  time.Time // an answer or an event; zero: none yet
	away  time.Time // when it failed first after that; zero: it did not
	err   error     // the last one while it is away
	ended time.Time // when a watch last ended at once
}

func newAPIServer() *apiServer {
	return &apiServer{
		resources: make(map[string]*heard),
		errors: metrics.NewCounterVec(&metrics.CounterOpts{
			Name: "plimsoll_lb_api_errors_total",
			Help: "Lists and watches of the API server that failed, were cut off, or were answered by something else",
		}, []string{"resource"}),
	}
}

func (a *apiServer) register(registry metrics.KubeRegistry) {
	registry.MustRegister(a.errors)
	registry.RawMustRegister(prometheus.NewGaugeFunc(
		prometheus.GaugeOpts{Name: "plimsoll_lb_api_away_seconds", Help: "Since when the API server is away, for one resource or all; 0 while it answers"},
		func() float64 { return a.away().Seconds() },
	))
}

// away is how long it has been.
func (a *apiServer) away() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.since.IsZero() {
		return 0
	}
	return time.Since(a.since)
}

// of makes the entry of a resource.
func (a *apiServer) of(resource string) *heard {
	h := a.resources[resource]
	if h == nil {
		h = new(heard)
		a.resources[resource] = h
	}
	return h
}

// watches says that a resource is going to be asked for.
func (a *apiServer) watches(resource string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.of(resource)
	a.errors.WithLabelValues(resource)
}

// answers says that a resource was listed, or that a watch of it goes on.
func (a *apiServer) answers(resource string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	h := a.of(resource)
	h.last = time.Now()
	if h.away.IsZero() {
		return
	}
	h.away, h.err = time.Time{}, nil
	for _, other := range a.resources {
		if !other.away.IsZero() {
			return
		}
	}
	if a.told {
		klog.InfoS("API server answers again: changes that were made meanwhile follow", "away", time.Since(a.since).Round(time.Millisecond))
	}
	a.since, a.told = time.Time{}, false
}

// fails says that a list or a watch did.
func (a *apiServer) fails(resource string, err error) {
	a.errors.WithLabelValues(resource).Inc()
	a.mu.Lock()
	defer a.mu.Unlock()
	h := a.of(resource)
	h.err = err
	now := time.Now()
	if h.away.IsZero() {
		h.away = now
	}
	if a.since.IsZero() {
		a.since = now
	}
	// A watch that is cut off says little, and what is asked next has a reason or is answered. One that is so each time is told of.
	if errors.Is(err, errEnded) {
		again := time.Since(h.ended) < awayLogPeriod
		if h.ended = now; !again {
			return
		}
	}
	if time.Since(a.said) < awayLogPeriod {
		return
	}
	a.said, a.told = now, true
	klog.ErrorS(err, "API server is away: Services are carried as they were known, and changes wait", "resource", resource, "away", now.Sub(a.since).Round(time.Second))
}

// An APIReport is what an agent hears of the API server about a resource.
type APIReport struct {
	Resource  string    `json:"resource"`
	LastHeard time.Time `json:"lastHeard,omitzero"` // zero: nothing yet
	AwaySince time.Time `json:"awaySince,omitzero"` // zero: it answers
	LastError string    `json:"lastError,omitempty"`
}

// report tells of all resources, sorted.
func (a *apiServer) report() []APIReport {
	a.mu.Lock()
	defer a.mu.Unlock()
	reports := []APIReport{}
	for _, name := range slices.Sorted(maps.Keys(a.resources)) {
		h := a.resources[name]
		r := APIReport{Resource: name, LastHeard: h.last, AwaySince: h.away}
		if h.err != nil {
			r.LastError = h.err.Error()
		}
		reports = append(reports, r)
	}
	return reports
}

// A lister is what an informer wants of a typed client.
type lister[L metav1.ListInterface] interface {
	List(context.Context, metav1.ListOptions) (L, error)
	Watch(context.Context, metav1.ListOptions) (watch.Interface, error)
}

// informersOf makes a factory with one informer, of the objects that a client lists and selects chooses, which tells api how that goes. A
// nil selects chooses all.
func informersOf[L interface {
	runtime.Object
	metav1.ListInterface
}](api *apiServer, client kubernetes.Interface, object runtime.Object, resource string, objects lister[L], selects func(*metav1.ListOptions)) informers.SharedInformerFactory {
	api.watches(resource)
	if selects == nil {
		selects = func(*metav1.ListOptions) {}
	}
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			selects(&options)
			limited, cancel := context.WithTimeout(ctx, listLimit)
			defer cancel()
			list, err := objects.List(limited, options)
			// Subtle: client-go takes any other object of JSON for an empty list, and all would be withdrawn that it does not name. An
			// API server's has a version, and one that has it and is empty is believed: there is nothing then.
			if err == nil && list.GetResourceVersion() == "" {
				err = errNoList
			}
			if err != nil {
				api.asked(ctx, resource, err)
				return nil, err
			}
			api.answers(resource)
			return list, nil
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			selects(&options)
			return api.watch(ctx, resource, options, objects.Watch)
		},
	}
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(strip))
	factory.InformerFor(object, func(client kubernetes.Interface, _ time.Duration) cache.SharedIndexInformer {
		informer := cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, client), object, 0, cache.Indexers{})
		// Else each failure is a line of the log.
		quiet := func(_ context.Context, _ *cache.Reflector, err error) {
			klog.V(2).InfoS("List or watch failed", "resource", resource, "err", err)
		}
		if err := informer.SetWatchErrorHandlerWithContext(quiet); err != nil { // an informer that runs has one for good
			klog.ErrorS(err, "Failures are logged one by one", "resource", resource)
		}
		return informer
	})
	return factory
}

// asked says that a request failed, unless that is how the agent ends or how an API server works.
func (a *apiServer) asked(ctx context.Context, resource string, err error) {
	if ctx.Err() != nil || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // what is expired is listed anew
	}
	a.fails(resource, err)
}

// watch begins a watch by start, which goes on until it is silent for too long.
func (a *apiServer) watch(ctx context.Context, resource string, options metav1.ListOptions,
	start func(context.Context, metav1.ListOptions) (watch.Interface, error)) (watch.Interface, error) {
	limited, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(silenceLimit, func() { cancel(errSilent) })
	source, err := start(limited, options)
	if err != nil {
		timer.Stop()
		if errors.Is(context.Cause(limited), errSilent) {
			err = errSilent
		}
		cancel(nil)
		// An API server before 1.34 may refuse to send a list as a watch, and is asked for a list then.
		if !apierrors.IsInvalid(err) || options.SendInitialEvents == nil {
			a.asked(ctx, resource, err)
		}
		return nil, err
	}
	w := &observed{source: source, events: make(chan watch.Event), stopped: make(chan struct{})}
	a.running.Go(func() {
		defer cancel(nil)
		defer close(w.events)
		defer source.Stop()
		timer.Stop()
		w.forward(ctx, a, resource)
	})
	return w, nil
}

// An observed is a watch that somebody looks at.
type observed struct {
	source  watch.Interface
	events  chan watch.Event
	stopped chan struct{}
	once    sync.Once
}

var _ watch.Interface = (*observed)(nil)

func (w *observed) ResultChan() <-chan watch.Event { return w.events }

// Stop does not wait for the source, whose end may take a while.
func (w *observed) Stop() { w.once.Do(func() { close(w.stopped) }) }

// forward hands events on until the source ends or is silent, or Stop is called.
func (w *observed) forward(ctx context.Context, api *apiServer, resource string) {
	stands, silence := time.NewTimer(shortWatch), time.NewTimer(silenceLimit)
	defer stands.Stop()
	defer silence.Stop()
	good := false
	for {
		select {
		case <-w.stopped:
			return
		case <-stands.C:
			good = true
			api.answers(resource)
		case <-silence.C:
			api.asked(ctx, resource, errSilent)
			return
		case event, more := <-w.source.ResultChan():
			if !more {
				// Subtle: this is also how client-go says that a connection was reset. An API server ends a good one now and then.
				if !good {
					api.asked(ctx, resource, errEnded)
				}
				return
			}
			if event.Type == watch.Error {
				good = true // as far as its end is concerned
				api.asked(ctx, resource, apierrors.FromObject(event.Object))
			} else {
				good = true
				api.answers(resource)
			}
			select {
			case <-w.stopped:
				return
			case w.events <- event:
			}
			silence.Reset(silenceLimit)
		}
	}
}
