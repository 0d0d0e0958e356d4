// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"context"
	"fmt"
	"sync"

	"github.com/go-logr/logr"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// A view is what an informer of ours shows of one kind. It keeps names, not objects: a process that measures should not
// carry, nor have its garbage collector walk, 150,000 objects that it never reads.
type view struct {
	kind      kind
	namespace string
	source    cache.ListerWatcher

	mu      sync.Mutex
	have    map[string]string   // guarded by mu: name to tie, of what is ours; nil before the first list
	others  map[string]struct{} // guarded by mu: names of IPAddresses that are not ours
	changed chan struct{}       // guarded by mu: closed at the next change, when somebody waits
	err     error               // guarded by mu: why the last list or watch failed
}

var _ cache.ReflectorStore = (*view)(nil)

func newView(client kubernetes.Interface, namespace string, k kind) *view {
	v := &view{kind: k, namespace: namespace}
	v.source = cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			list, err := k.list(ctx, client, namespace, opts)
			v.note(err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			w, err := k.watch(ctx, client, namespace, opts)
			v.note(err)
			return w, err
		},
	}, client)
	return v
}

// run watches until ctx ends.
func (v *view) run(ctx context.Context) {
	// The reflector's own log lines go nowhere: a failed watch stands in the error of whoever awaits something.
	quiet := logr.Discard()
	r := cache.NewReflectorWithOptions(v.source, v.kind.example(), v, cache.ReflectorOptions{Name: "fleet", Logger: &quiet})
	r.RunWithContext(klog.NewContext(ctx, quiet))
}

// await returns when ready, which is called with v locked, accepts what the view shows.
func (v *view) await(ctx context.Context, what string, ready func(have map[string]string) bool) error {
	for {
		v.mu.Lock()
		if v.have != nil && ready(v.have) {
			v.mu.Unlock()
			return nil
		}
		if v.changed == nil {
			v.changed = make(chan struct{})
		}
		changed := v.changed
		v.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return v.late(what, context.Cause(ctx))
		}
	}
}

// follow returns when the view has shown the change, or for what we leave to the API server, when it shows exactly what is
// wanted.
func (v *view) follow(ctx context.Context, c change) error {
	if c.theirs {
		return v.await(ctx, fmt.Sprintf("exactly %d", len(c.want)), c.done)
	}
	made := make([]entry, len(c.missing))
	for i, at := range c.missing {
		made[i] = c.want[at]
	}
	if err := v.awaitShown(ctx, made); err != nil {
		return err
	}
	return v.awaitGone(ctx, c.surplus)
}

// awaitShown returns when the view has shown all of these.
func (v *view) awaitShown(ctx context.Context, entries []entry) error {
	seen := 0
	return v.await(ctx, fmt.Sprintf("%d new", len(entries)), func(have map[string]string) bool {
		for seen < len(entries) && have[entries[seen].name] == entries[seen].tie {
			seen++
		}
		return seen == len(entries)
	})
}

// awaitGone returns when the view has shown each of these gone.
func (v *view) awaitGone(ctx context.Context, entries []entry) error {
	gone := 0
	return v.await(ctx, fmt.Sprintf("the end of %d", len(entries)), func(have map[string]string) bool {
		for gone < len(entries) {
			if tie, ok := have[entries[gone].name]; ok && tie == entries[gone].tie {
				return false
			}
			gone++
		}
		return true
	})
}

// shows says whether the view shows exactly what is wanted now.
func (v *view) shows(c change) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return c.done(v.have)
}

func (v *view) late(what string, cause error) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.err != nil {
		return fmt.Errorf("await %s of %s in namespace %s, the watch shows %d and fails with %q: %w", what, v.kind, v.namespace, len(v.have), v.err, cause)
	}
	return fmt.Errorf("await %s of %s in namespace %s, the watch shows %d: %w", what, v.kind, v.namespace, len(v.have), cause)
}

// compare says how what the view shows differs from what is wanted.
func (v *view) compare(want []entry) change {
	v.mu.Lock()
	defer v.mu.Unlock()
	c := change{want: want}
	right := make(map[string]struct{}, len(want))
	for i, e := range want {
		if tie, ok := v.have[e.name]; ok && tie == e.tie {
			right[e.name] = struct{}{}
		} else {
			c.missing = append(c.missing, i)
		}
	}
	for name, tie := range v.have {
		if _, ok := right[name]; !ok {
			c.surplus = append(c.surplus, entry{name, tie})
		}
	}
	return c
}

// foreign says whether an object of this name belongs to somebody else.
func (v *view) foreign(name string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, ok := v.others[name]
	return ok
}

func (v *view) note(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.err = err
}

// update changes the view under its lock and wakes who waits.
func (v *view) update(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f()
	if v.changed != nil {
		close(v.changed)
		v.changed = nil
	}
}

func (v *view) put(obj any) {
	switch e, ours := entryOf(obj, v.namespace); {
	case ours:
		v.have[e.name] = e.tie
		delete(v.others, e.name)
	case v.kind == kindIPAddress:
		v.others[e.name] = struct{}{}
		delete(v.have, e.name)
	}
}

// Add, Update, Delete, Replace and Resync are what a reflector calls. They never fail.
func (v *view) Add(obj any) error {
	v.update(func() { v.put(obj) })
	return nil
}

func (v *view) Update(obj any) error { return v.Add(obj) }

func (v *view) Delete(obj any) error {
	v.update(func() {
		e, _ := entryOf(obj, v.namespace)
		delete(v.have, e.name)
		delete(v.others, e.name)
	})
	return nil
}

func (v *view) Replace(objs []any, _ string) error {
	v.update(func() {
		v.have, v.others = make(map[string]string, len(objs)), make(map[string]struct{})
		for _, obj := range objs {
			v.put(obj)
		}
	})
	return nil
}

func (v *view) Resync() error { return nil }
