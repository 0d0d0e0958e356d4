// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
)

// storageWriters is how many writes are under way at once. Etcd takes those that wait together into one round of its log.
const storageWriters = 64

// storageWriter writes into etcd, beside the API server, the bytes that the API server would have written. Templates that it
// made itself have whatever a version of it adds: defaults, managed fields.
type storageWriter struct {
	etcd      *clientv3.Client
	prefix    string
	namespace string
	codec     runtime.Serializer

	address *networkingv1.IPAddress
	slice   *discoveryv1.EndpointSlice
	service *corev1.Service
}

var _ writer = (*storageWriter)(nil)

// newStorageWriter learns what the API server stores, without making anything: from the answers to a Service and a slice that
// are created as a dry run, and from the IPAddress of the Service that every API server makes for itself.
//
// Note: a real Service, made and deleted again, was tried. The API server's repair of addresses ran into it now and then, and
// left its IPAddress for a minute.
func newStorageWriter(ctx context.Context, client kubernetes.Interface, etcd *clientv3.Client, prefix string, plan Plan) (*storageWriter, error) {
	w := &storageWriter{etcd: etcd, prefix: prefix, namespace: plan.Namespace, codec: protobuf.NewSerializer(scheme.Scheme, scheme.Scheme)}
	own, err := client.CoreV1().Services(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("the API server's own Service: %w", err)
	}
	if err := w.check(ctx, prefix+"/services/specs/default/kubernetes"); err != nil {
		return nil, err
	}
	if err := w.check(ctx, prefix+"/endpointslices/default/kubernetes"); err != nil {
		return nil, err
	}
	if err := w.check(ctx, w.key(kindIPAddress, own.Spec.ClusterIP)); err != nil {
		return nil, err
	}
	if w.address, err = client.NetworkingV1().IPAddresses().Get(ctx, own.Spec.ClusterIP, metav1.GetOptions{}); err != nil {
		return nil, fmt.Errorf("the IPAddress of the API server's own Service: %w", err)
	}
	w.address.ResourceVersion = ""
	w.address.SetGroupVersionKind(networkingv1.SchemeGroupVersion.WithKind("IPAddress"))

	dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	template := plan.service(0, plan.serviceAddr(0))
	if w.slice, err = client.DiscoveryV1().EndpointSlices(plan.Namespace).Create(ctx, newSlice(plan, template), dry); err != nil {
		return nil, fmt.Errorf("template slice: %w", err)
	}
	w.slice.SetGroupVersionKind(discoveryv1.SchemeGroupVersion.WithKind("EndpointSlice"))
	// The API server chooses the address, as it does for most Services.
	wish := newService(plan, template)
	wish.Spec.ClusterIP = ""
	if w.service, err = client.CoreV1().Services(plan.Namespace).Create(ctx, wish, dry); err != nil {
		return nil, fmt.Errorf("template service: %w", err)
	}
	w.service.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Service"))
	return w, nil
}

// check reads a stored object and fails unless we would write it byte by byte the same: storage may be encrypted, elsewhere,
// or of a version with fields that ours has not.
func (w *storageWriter) check(ctx context.Context, key string) error {
	got, err := w.etcd.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("read %s: %w", key, err)
	}
	if len(got.Kvs) != 1 {
		return fmt.Errorf("read %s: not in this etcd; is %q the API server's prefix?", key, w.prefix)
	}
	stored := got.Kvs[0].Value
	obj, _, err := w.codec.Decode(stored, nil, nil)
	if err != nil {
		return fmt.Errorf("read %s as the API server's storage: %w", key, err)
	}
	var same bytes.Buffer
	if err := w.codec.Encode(obj, &same); err != nil {
		return fmt.Errorf("write %s: %w", key, err)
	}
	if !bytes.Equal(same.Bytes(), stored) {
		return fmt.Errorf("the API server stores %s in %d bytes where we would write %d others: it is of another version", key, len(stored), same.Len())
	}
	return nil
}

// key is where the API server stores an object.
func (w *storageWriter) key(k kind, name string) string {
	switch k {
	case kindIPAddress:
		return w.prefix + "/ipaddresses/" + name
	case kindSlice:
		return w.prefix + "/endpointslices/" + w.namespace + "/" + name
	default:
		return w.prefix + "/services/specs/" + w.namespace + "/" + name
	}
}

// object is the object of a kind of s, with its name. It shares with the template what is the same in all.
func (w *storageWriter) object(k kind, s Service, now metav1.Time) (runtime.Object, string) {
	switch k {
	case kindIPAddress:
		o := *w.address
		ref := *o.Spec.ParentRef
		ref.Namespace, ref.Name = w.namespace, s.Name
		o.Spec.ParentRef = &ref
		o.ObjectMeta = fresh(o.ObjectMeta, s.Address.Addr().String(), now)
		return &o, o.Name
	case kindSlice:
		o := *w.slice
		o.ObjectMeta = fresh(o.ObjectMeta, s.Name, now)
		o.Labels = newLabels(s)
		o.Endpoints = newEndpoints(s)
		return &o, o.Name
	default:
		o := *w.service
		o.ObjectMeta = fresh(o.ObjectMeta, s.Name, now)
		o.Spec.ClusterIP = s.Address.Addr().String()
		o.Spec.ClusterIPs = []string{o.Spec.ClusterIP}
		return &o, o.Name
	}
}

// fresh is the template's metadata for a new object that was made now.
func fresh(m metav1.ObjectMeta, name string, now metav1.Time) metav1.ObjectMeta {
	m.Name = name
	m.UID = uuid.NewUUID()
	m.CreationTimestamp = now
	m.ManagedFields = slices.Clone(m.ManagedFields)
	for i := range m.ManagedFields {
		m.ManagedFields[i].Time = &now
	}
	return m
}

// create never overwrites: an object that somebody made meanwhile is an error that names it. A transaction holds one object
// of each kind, which have one resource version then.
//
// Note: 120 objects a transaction were tried, and are several times as quick to write. But the API server counts on one
// object of a kind a version: whoever's watch ends in the middle of them, as busy watches do, and goes on from that version
// is never sent the others. Our own watch missed 64 of 500 slices that way.
func (w *storageWriter) create(ctx context.Context, batch [kinds][]Service, wrote func(int)) error {
	now := metav1.Now().Rfc3339Copy()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(storageWriters)
	for i := range longest(batch) {
		group.Go(func() error {
			var absent []clientv3.Cmp
			var puts, found []clientv3.Op
			for k := range kinds {
				if i >= len(batch[k]) {
					continue
				}
				obj, name := w.object(k, batch[k][i], now)
				var value bytes.Buffer
				if err := w.codec.Encode(obj, &value); err != nil {
					return fmt.Errorf("encode %s %s: %w", k, name, err)
				}
				key := w.key(k, name)
				absent = append(absent, clientv3.Compare(clientv3.CreateRevision(key), "=", 0))
				puts = append(puts, clientv3.OpPut(key, value.String()))
				found = append(found, clientv3.OpGet(key, clientv3.WithKeysOnly()))
			}
			done, err := w.etcd.Txn(ctx).If(absent...).Then(puts...).Else(found...).Commit()
			if err != nil {
				return fmt.Errorf("write %s: %w", puts[0].KeyBytes(), err)
			}
			if !done.Succeeded {
				for _, r := range done.Responses {
					for _, kv := range r.GetResponseRange().Kvs {
						return fmt.Errorf("write %s: somebody else made it meanwhile", kv.Key)
					}
				}
			}
			wrote(len(puts))
			return nil
		})
	}
	return group.Wait()
}

func (w *storageWriter) remove(ctx context.Context, batch [kinds][]entry, wrote func(int)) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(storageWriters)
	for i := range longest(batch) {
		group.Go(func() error {
			var deletes []clientv3.Op
			for k := range kinds {
				if i < len(batch[k]) {
					deletes = append(deletes, clientv3.OpDelete(w.key(k, batch[k][i].name)))
				}
			}
			if _, err := w.etcd.Txn(ctx).Then(deletes...).Commit(); err != nil {
				return fmt.Errorf("delete %s: %w", deletes[0].KeyBytes(), err)
			}
			wrote(len(deletes))
			return nil
		})
	}
	return group.Wait()
}

// update stores what the API server would have stored of an update: the same object with other endpoints, a higher generation and a later time.
func (w *storageWriter) update(ctx context.Context, s Service) error {
	key := w.key(kindSlice, s.Name)
	got, err := w.etcd.Get(ctx, key)
	if err != nil {
		return fmt.Errorf("read %s: %w", key, err)
	}
	if len(got.Kvs) != 1 {
		return fmt.Errorf("read %s: it is not there", key)
	}
	obj, _, err := w.codec.Decode(got.Kvs[0].Value, nil, nil)
	if err != nil {
		return fmt.Errorf("decode %s: %w", key, err)
	}
	slice, ok := obj.(*discoveryv1.EndpointSlice)
	if !ok {
		return fmt.Errorf("decode %s: it is a %T", key, obj)
	}
	slice.Endpoints = newEndpoints(s)
	slice.Generation++
	now := metav1.Now().Rfc3339Copy()
	for i := range slice.ManagedFields {
		slice.ManagedFields[i].Time = &now
	}
	var value bytes.Buffer
	if err := w.codec.Encode(slice, &value); err != nil {
		return fmt.Errorf("encode %s: %w", key, err)
	}
	unchanged := clientv3.Compare(clientv3.ModRevision(key), "=", got.Kvs[0].ModRevision)
	done, err := w.etcd.Txn(ctx).If(unchanged).Then(clientv3.OpPut(key, value.String())).Commit()
	if err != nil {
		return fmt.Errorf("write %s: %w", key, err)
	}
	if !done.Succeeded {
		return fmt.Errorf("write %s: somebody else changed it meanwhile", key)
	}
	return nil
}

// longest is the length of the longest list.
func longest[T any](batch [kinds][]T) int {
	n := 0
	for _, list := range batch {
		n = max(n, len(list))
	}
	return n
}
