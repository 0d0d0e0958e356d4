// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netlink"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/klog/v2"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// Logs hold what klog writes while a test runs, each line once.
type Logs struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// StartLogs must come before what logs is started.
func StartLogs(t *testing.T) *Logs {
	l, state := new(Logs), klog.CaptureState()
	klog.LogToStderr(false)
	// A line goes to the outputs of all lesser severities, too.
	klog.SetOutput(io.Discard)
	klog.SetOutputBySeverity("INFO", l)
	t.Cleanup(state.Restore)
	return l
}

func (l *Logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *Logs) String() string {
	klog.Flush()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// Count tells how often a text stands there.
func (l *Logs) Count(text string) int { return strings.Count(l.String(), text) }

func newTestNodes() coreinformers.NodeInformer {
	return informers.NewSharedInformerFactory(fake.NewClientset(), 0).Core().V1().Nodes()
}

// newTestStatus is one without a load balancer.
func newTestStatus(network *network) *status {
	return newStatus(nil, newTestNodes(), "here", network, new(ipv6), newAPIServer(), "")
}

// An API server that is away for an hour is a line in the log a minute, and one that comes and goes all the time no more.
func TestAwayIsSaidOnceAMinute(t *testing.T) {
	const away, back = `"API server is away`, `"API server answers again`
	for name, flaps := range map[string]bool{"away for an hour": false, "comes and goes": true} {
		t.Run(name, func(t *testing.T) {
			log := StartLogs(t)
			synctest.Test(t, func(t *testing.T) {
				api := newAPIServer()
				for range 360 {
					for _, resource := range []string{"services", "nodes"} {
						api.fails(resource, errors.New("connection refused"))
					}
					time.Sleep(5 * time.Second)
					if flaps {
						api.answers("services")
						api.answers("nodes")
					}
					time.Sleep(5 * time.Second)
				}
				if n := log.Count(away); n != 60 {
					t.Errorf("%d lines in an hour, want 60", n)
				}
				if got := api.away(); !flaps && got != time.Hour {
					t.Errorf("away for %v, want an hour", got)
				}
				api.answers("services")
				if got := api.away(); !flaps && got == 0 {
					t.Error("one of two resources answers, and nothing is away")
				}
				api.answers("nodes")
				if got := api.away(); got != 0 {
					t.Errorf("away for %v though all answers", got)
				}
				if n := log.Count(back); !flaps && n != 1 || flaps && n != 60 {
					t.Errorf("%d times it is said to answer again", n)
				}
			})
		})
	}
}

// A watch that was cut off once is no line, one that is cut off each time is.
func TestWatchesCutOff(t *testing.T) {
	log := StartLogs(t)
	synctest.Test(t, func(t *testing.T) {
		api := newAPIServer()
		for i, want := range []int{0, 1} {
			api.answers("services")
			api.fails("services", errEnded)
			if got := log.Count("API server is away"); got != want {
				t.Errorf("%d lines after %d watches, want %d", got, i+1, want)
			}
			time.Sleep(time.Second)
		}
	})
}

// A watch that is silent, and one that is never answered, end: the informer begins another.
func TestSilentWatchEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api, source := newAPIServer(), watch.NewRaceFreeFake()
		w, err := api.watch(t.Context(), "services", metav1.ListOptions{}, func(context.Context, metav1.ListOptions) (watch.Interface, error) { return source, nil })
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			time.Sleep(silenceLimit - time.Second)
			source.Action(watch.Bookmark, &v1.Service{})
			if event := <-w.ResultChan(); event.Type != watch.Bookmark {
				t.Errorf("want a bookmark, got %v", event)
			}
		}
		if since := api.report()[0].AwaySince; !since.IsZero() {
			t.Errorf("away since %v", since)
		}
		start := time.Now()
		if event, more := <-w.ResultChan(); more {
			t.Errorf("want the end, got %v", event)
		}
		if took := time.Since(start); took != silenceLimit {
			t.Errorf("it took %v, want %v", took, silenceLimit)
		}
		synctest.Wait()
		if !source.IsStopped() {
			t.Error("the source goes on")
		}
		if r := api.report()[0]; r.AwaySince.IsZero() || r.LastError != errSilent.Error() {
			t.Errorf("the report is %+v", r)
		}
		_, err = api.watch(t.Context(), "services", metav1.ListOptions{}, func(ctx context.Context, _ metav1.ListOptions) (watch.Interface, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		if !errors.Is(err, errSilent) {
			t.Errorf("want %v, got %v", errSilent, err)
		}
	})
}

// What does not fit is late after a while, and is not when it does fit.
func TestFullMapIsUnhealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestStatus(nil)
		full := &lb.FrontendError{Frontend: lb.Frontend{Address: netip.MustParseAddrPort("10.96.0.10:80")}, Err: lb.ErrFull}
		s.started(v1.IPv4Protocol)
		s.queued(v1.IPv4Protocol)
		s.synced(outcome{family: v1.IPv4Protocol, start: time.Now(), err: errors.Join(full)})
		if !s.now().Healthy {
			t.Error("unhealthy before it is late")
		}
		time.Sleep(2 * retryPeriod)
		if s.now().Healthy {
			t.Error("healthy though a Service has waited for a minute")
		}
		s.synced(outcome{family: v1.IPv4Protocol, start: time.Now()})
		if !s.now().Healthy {
			t.Error("unhealthy after all was programmed")
		}
	})
}

// Devices that cannot be watched make the agent unhealthy until they can.
func TestDevicesNotWatched(t *testing.T) {
	n := &network{subscribe: func(chan<- netlink.LinkUpdate, <-chan struct{}, netlink.LinkSubscribeOptions) error {
		return errors.New("no buffer space")
	}}
	s := newTestStatus(n)
	s.started(v1.IPv4Protocol)
	if links := n.rewatch(nil); links != nil {
		t.Error("a watch that failed has a channel")
	}
	if faults := n.faults(); len(faults) != 1 || faults[0] != "devices are not watched: watch devices: no buffer space" {
		t.Errorf("the faults are %q", faults)
	}
	if s.now().Healthy {
		t.Error("healthy though devices are not watched")
	}
	r := Report{Faults: n.faults(), Hooks: []string{"connect4"}, Devices: []string{"eth0"}}
	if r.judge(); r.Replacement != Partial || len(r.Reasons) != 1 || r.Reasons[0] != "packets: "+n.faults()[0] {
		t.Errorf("%s because of %q", r.Replacement, r.Reasons)
	}
	n.subscribe = func(chan<- netlink.LinkUpdate, <-chan struct{}, netlink.LinkSubscribeOptions) error { return nil }
	if links := n.rewatch(nil); links == nil {
		t.Error("a watch has no channel")
	}
	if faults := n.faults(); len(faults) != 0 || !s.now().Healthy {
		t.Errorf("unhealthy after the watch began anew: %q", faults)
	}
	n.lack(looping, errors.New("no veth"))
	r = Report{Faults: n.faults(), Hooks: []string{"connect4"}, Devices: []string{"eth0"}}
	if r.judge(); !s.now().Healthy || r.Replacement != Partial || len(r.Reasons) != 1 || !strings.HasSuffix(r.Reasons[0], "by their sockets alone: no veth") {
		t.Errorf("without a loop: healthy %t, %s because of %q", s.now().Healthy, r.Replacement, r.Reasons)
	}
}

// What a clock that was set says of a change's age has no metric sink.
func TestChangesOfAnotherTime(t *testing.T) {
	s := newTestStatus(nil)
	const name = "kubeproxy_network_programming_duration_seconds"
	sum := func() (total float64) {
		families, err := legacyregistry.DefaultGatherer.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			if family.GetName() == name {
				for _, m := range family.Metric {
					total += m.GetHistogram().GetSampleSum()
				}
			}
		}
		return total
	}
	before := sum()
	s.synced(outcome{family: v1.IPv4Protocol, start: time.Now(), triggers: map[types.NamespacedName][]time.Time{{Name: "web"}: {time.Now().AddDate(1, 0, 0).Round(0)}}})
	if after := sum(); after != before {
		t.Errorf("%s went from %v to %v", name, before, after)
	}
}

// A lock that any process may hold is told of, and no more: health is as good as before.
func TestOtherAgentInTheNetworkNamespace(t *testing.T) {
	log := StartLogs(t)
	cfg := Config{Devices: []string{"*"}, NetNS: filepath.Join(t.TempDir(), "netns")}
	if err := os.WriteFile(cfg.NetNS, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	balancer, err := lb.Load(lb.Options{})
	if errors.Is(err, lb.ErrNotSupported) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer balancer.Close()
	for i, want := range []string{"", cfg.NetNS} {
		held, err := lockNode(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer held.close()
		if held.taken != want {
			t.Errorf("agent %d: another one is at %q, want %q", i+1, held.taken, want)
		}
		s := newStatus(balancer, newTestNodes(), "here", nil, new(ipv6), newAPIServer(), held.taken)
		r := Report{OtherAgent: s.taken, Healthy: s.now().Healthy, Hooks: []string{"connect4"}, Devices: []string{"eth0"}}
		if r.judge(); !r.Healthy || len(r.Reasons) != i {
			t.Errorf("agent %d: healthy %t, with notes %q", i+1, r.Healthy, r.Reasons)
		}
		families, err := s.registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			if got := family.GetMetric()[0].GetGauge().GetValue(); family.GetName() == "plimsoll_lb_other_agents" && got != float64(i) {
				t.Errorf("agent %d: the metric is %v", i+1, got)
			}
		}
	}
	if n := log.Count("The network namespace is locked: another agent may be at work there"); n != 1 {
		t.Errorf("%d lines say so, want 1", n)
	}
}
