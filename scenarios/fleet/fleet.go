// SPDX-License-Identifier: Apache-2.0

// Package fleet is the Services under test: N selectorless ClusterIP Services with E endpoints each, grown and shrunk rung
// by rung, the same for every mode.
package fleet

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
)

// Timing is how long a Scale took, each counted from its start.
type Timing struct {
	// Written: storage or API server has accepted the last write.
	Written time.Duration
	// Informed: our watches have shown exactly the wanted Services, slices and IPAddresses.
	Informed time.Duration
	// Listed: after that, LISTs have shown the same.
	Listed time.Duration
}

// A Fleet is N Services in one cluster. Service and Len may be called during a Scale, which changes Len at its end.
type Fleet struct {
	plan   Plan
	client kubernetes.Interface
	write  writer
	stored bool // write goes to the API server's storage
	views  [kinds]*view
	stop   context.CancelFunc
	done   sync.WaitGroup

	scaling sync.Mutex              // one Scale at a time
	rand    *rand.Rand              // guarded by scaling
	used    map[netip.Addr]struct{} // guarded by scaling: what addrs holds

	mu    sync.RWMutex
	addrs []netip.Addr // guarded by mu: the address of Service i; outlives a shrink, so that i keeps its address
	size  int          // guarded by mu
}

// writer puts objects into the cluster and takes them out, as many side by side as it can. wrote is told how many more are
// done.
type writer interface {
	create(ctx context.Context, batch [kinds][]Service, wrote func(int)) error
	remove(ctx context.Context, batch [kinds][]entry, wrote func(int)) error
	// update gives the slice of s the backends of s.
	update(ctx context.Context, s Service) error
}

// New makes an empty fleet. With etcd it writes into the API server's storage below prefix ("/registry") what the API server
// itself would have stored, which it learns from the answers to a dry run. With a nil etcd it writes through the API, which takes minutes from some ten thousand Services on. It is an error when the namespace already
// holds Services. Close ends the fleet's watches.
func New(ctx context.Context, client kubernetes.Interface, etcd *clientv3.Client, prefix string, plan Plan) (*Fleet, error) {
	if err := plan.validate(); err != nil {
		return nil, err
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: plan.Namespace}}
	if _, err := client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("namespace %s: %w", plan.Namespace, err)
	}
	found, err := client.CoreV1().Services(plan.Namespace).List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return nil, fmt.Errorf("services in %s: %w", plan.Namespace, err)
	}
	if len(found.Items) > 0 {
		return nil, fmt.Errorf("namespace %s already holds Services (%s): a fleet needs a namespace of its own", plan.Namespace, found.Items[0].Name)
	}

	f := &Fleet{
		plan:   plan,
		client: client,
		write:  &apiWriter{client: client, plan: plan},
		stored: etcd != nil,
		rand:   rand.New(rand.NewPCG(plan.Seed, 0)),
		used:   make(map[netip.Addr]struct{}),
	}
	if f.stored {
		if f.write, err = newStorageWriter(ctx, client, etcd, prefix, plan); err != nil {
			return nil, err
		}
	}
	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	f.stop = stop
	for k := range kinds {
		f.views[k] = newView(client, plan.Namespace, k)
		f.done.Go(func() { f.views[k].run(watching) })
	}
	for _, v := range f.views {
		if err := v.await(ctx, "its first list", func(map[string]string) bool { return true }); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

// Fixed is a fleet of n Services that the caller writes where nothing else is, from these objects: first the slices, then the Services. It has no
// watches and is never scaled.
func Fixed(plan Plan, n int) (*Fleet, []runtime.Object, error) {
	if err := plan.validate(); err != nil {
		return nil, nil, err
	}
	f := &Fleet{plan: plan, stop: func() {}, rand: rand.New(rand.NewPCG(plan.Seed, 0)), used: make(map[netip.Addr]struct{}), size: n}
	services, err := f.allocate(n)
	if err != nil {
		return nil, nil, err
	}
	objects := make([]runtime.Object, 2*n)
	for i, s := range services {
		objects[i], objects[n+i] = newSlice(plan, s), newService(plan, s)
	}
	return f, objects, nil
}

// Len is the number of Services after the last Scale.
func (f *Fleet) Len() int {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.size
}

// Service is number i of Len. The newest is Len-1. A Service keeps its name, address and backends through every Scale.
func (f *Fleet) Service(i int) Service {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.plan.service(i, f.addrs[i])
}

// Backends are what those of Service i would be with other ranges: on a node whose own pods answer on them.
func (f *Fleet) Backends(i int, prefixes []netip.Prefix) []netip.AddrPort {
	plan := f.plan
	plan.EndpointPrefixes = prefixes
	return plan.service(i, netip.Addr{}).Backends
}

// SetEndpoints writes new endpoints, all ready, into the slice of Service i, which keeps its port, in place of those that the plan gives it or
// that were set before. It returns when they are stored. A change of the same slice that somebody else makes meanwhile is an error. Scale
// leaves them, and Service does not tell of them. It may be called for several Services at once, and after Close.
func (f *Fleet) SetEndpoints(ctx context.Context, i int, addresses ...netip.Addr) error {
	s := f.Service(i)
	s.Backends = make([]netip.AddrPort, len(addresses))
	for e, address := range addresses {
		s.Backends[e] = netip.AddrPortFrom(address, uint16(f.plan.TargetPort))
	}
	return f.write.update(ctx, s)
}

// Close ends the watches. The Services stay in the cluster: Scale to 0 removes them.
func (f *Fleet) Close() {
	f.stop()
	f.done.Wait()
}

// Scale creates what is missing of Services 0 to n-1, deletes everything else in the namespace, and returns once LISTs and our
// own watches show exactly n Services with their slices and IPAddresses. What others deleted since the last Scale is
// missing. progress, which may be nil, is told how many objects (some three a Service) of how many are written.
func (f *Fleet) Scale(ctx context.Context, n int, progress func(done, total int)) (Timing, error) {
	f.scaling.Lock()
	defer f.scaling.Unlock()
	var t Timing
	start := time.Now()
	for {
		services, err := f.allocate(n)
		if err != nil {
			return t, err
		}
		plans := f.compare(services)
		if err := f.apply(ctx, services, plans, progress); err != nil {
			return t, err
		}
		t.Written = time.Since(start)
		exact := true
		for k, c := range plans {
			if err := f.views[k].follow(ctx, c); err != nil {
				return t, err
			}
			exact = exact && f.views[k].shows(c)
		}
		t.Informed = time.Since(start)
		if !exact {
			// Somebody else made or deleted something meanwhile; the API server does, when it repairs addresses.
			continue
		}
		if exact, err = f.list(ctx, plans); err != nil {
			return t, err
		}
		t.Listed = time.Since(start)
		if exact {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.size = n
			return t, nil
		}
	}
}

// compare says what of each kind is to be done for exactly these services.
func (f *Fleet) compare(services []Service) [kinds]change {
	var plans [kinds]change
	for k := range kinds {
		want := k.entries(services, f.plan.Namespace)
		if k == kindIPAddress && !f.stored {
			plans[k] = change{want: want, theirs: true}
		} else {
			plans[k] = f.views[k].compare(want)
		}
	}
	return plans
}

// list returns true when LISTs show what the watches do. A LIST may be ahead of a watch; false means that the watch has begun
// to show something else.
func (f *Fleet) list(ctx context.Context, plans [kinds]change) (bool, error) {
	var same [kinds]bool
	group, ctx := errgroup.WithContext(ctx)
	for k := range kinds {
		group.Go(func() (err error) {
			for !same[k] && err == nil && f.views[k].shows(plans[k]) {
				same[k], err = k.listed(ctx, f.client, f.plan.Namespace, plans[k])
			}
			return err
		})
	}
	err := group.Wait()
	return same == [kinds]bool{true, true, true}, err
}

// round is how many Services are written between two looks at what the API server shows.
const round = 2500

// apply removes what is surplus and writes what is missing. The order is that of a careful administrator: a dataplane never
// sees a Service before its endpoints, and the API server, which checks that each Service's address is allocated to it,
// never a Service without its IPAddress.
func (f *Fleet) apply(ctx context.Context, services []Service, plans [kinds]change, progress func(done, total int)) error {
	count := counter{report: progress}
	for _, c := range plans {
		count.total += len(c.missing) + len(c.surplus)
	}
	first := [kinds][]entry{kindService: plans[kindService].surplus}
	if err := f.write.remove(ctx, first, count.add); err != nil {
		return err
	}
	if err := f.views[kindService].awaitGone(ctx, first[kindService]); err != nil {
		return err
	}
	then := [kinds][]entry{kindIPAddress: plans[kindIPAddress].surplus, kindSlice: plans[kindSlice].surplus}
	if err := f.write.remove(ctx, then, count.add); err != nil {
		return err
	}

	// A Service follows a round behind its slice and its IPAddress.
	var behind []Service
	for start := 0; start < len(services) || len(behind) > 0; start += round {
		var batch [kinds][]Service
		for k := range kinds {
			batch[k] = plans[k].take(services, start, start+round)
		}
		batch[kindService], behind = behind, batch[kindService]
		if err := f.write.create(ctx, batch, count.add); err != nil {
			return err
		}
		// Subtle: the API server's own check of addresses reads a watch like ours; what ours shows, its shows too.
		if err := f.views[kindIPAddress].awaitShown(ctx, kindIPAddress.entries(batch[kindIPAddress], f.plan.Namespace)); err != nil {
			return err
		}
	}
	return nil
}

// allocate gives Services 0 to n-1 their addresses, new ones where they have none yet or lost it to somebody else.
func (f *Fleet) allocate(n int) ([]Service, error) {
	if room := f.plan.serviceRoom(); n < 0 || uint64(n) > room {
		return nil, fmt.Errorf("%d Services: the Service range %s has room for 0 to %d", n, f.plan.ServiceCIDR, room)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	services := make([]Service, n)
	for i := range n {
		if i == len(f.addrs) {
			f.addrs = append(f.addrs, netip.Addr{})
		}
		if !f.addrs[i].IsValid() || f.foreign(f.addrs[i]) {
			addr, err := f.draw()
			if err != nil {
				return nil, err
			}
			f.addrs[i] = addr
		}
		services[i] = f.plan.service(i, f.addrs[i])
	}
	return services, nil
}

// foreign says whether an address is somebody else's.
func (f *Fleet) foreign(addr netip.Addr) bool {
	view := f.views[kindIPAddress]
	return view != nil && view.foreign(addr.String())
}

// draw finds an address that neither the fleet nor anybody else has.
func (f *Fleet) draw() (netip.Addr, error) {
	room := f.plan.serviceRoom()
	first := f.rand.Uint64N(room)
	for step := range room {
		addr := f.plan.serviceAddr((first + step) % room)
		if _, used := f.used[addr]; used || f.foreign(addr) {
			continue
		}
		f.used[addr] = struct{}{}
		return addr, nil
	}
	return netip.Addr{}, fmt.Errorf("the Service range %s is full", f.plan.ServiceCIDR)
}

// counter adds up what parallel writers have done and reports it, one call at a time.
type counter struct {
	report func(done, total int)
	total  int

	mu   sync.Mutex
	done int // guarded by mu
}

func (c *counter) add(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done += n
	if c.report != nil {
		c.report(c.done, c.total)
	}
}
